"""The model card: README.md of a model folder, made from the record of the run."""

from __future__ import annotations

import tinyvlm
from tinyvlm.train.report import Account, facts


def model_card(account: Account) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    run, parameters = account.run, account.result["parameters"]
    config, model = run.config, run.recipe.get("model", {})
    total = sum(count["all"] for name, count in parameters.items() if name != "new_tokens")
    rates = {name: getattr(config.rates, name) for name in ("vision", "connector", "language", "new_tokens")}
    hot = "\n".join(
        f"| {name} | {count['all']:,} | {count['hot']:,} | {f'{rates[name]:g}' if count['hot'] else 'frozen'} |"
        for name, count in parameters.items()
    )
    rule = [
        ("optimizer, precision", f"{config.optimizer}, {config.precision}"),
        ("schedule", f"{config.schedule} after {config.warmup_steps} warm-up steps"),
        ("seed", str(config.seed)),
    ]
    told = "\n".join(f"| {name} | {_cell(text)} |" for name, text in [*rule, *facts(account)])
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [tinyvlm]
---

# TinyVLM, after the stage `{run.stage}`

A small vision-language model of {total:,} parameters: the vision tower of `{model.get("vision", "?")}`, a
connector, and `{model.get("language", "?")}`. One picture takes {model.get("num_image_tokens", "?")} tokens.

```python
import tinyvlm.model  # registers the classes
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
```

## How this stage trained it

| module | parameters | of them hot | peak learning rate |
|---|---|---|---|
{hot}

| | |
|---|---|
{told}

TinyVLM {tinyvlm.__version__}. All settings are in `recipe.json`, all inputs and numbers in `training.json`.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("  ", ", ")
