"""The model card: README.md of a model folder, made from the record of the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tinyvlm
from tinyvlm.train.run import TrainingRun


def model_card(run: TrainingRun, numbers: Mapping[str, Any], parameters: Mapping[str, Mapping[str, int]]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    config, model = run.config, run.recipe.get("model", {})
    total = sum(count["all"] for name, count in parameters.items() if name != "new_tokens")
    rates = {name: getattr(config.rates, name) for name in ("vision", "connector", "language", "new_tokens")}
    rows = "\n".join(
        f"| {name} | {count['all']:,} | {count['hot']:,} | {f'{rates[name]:g}' if count['hot'] else 'frozen'} |"
        for name, count in parameters.items()
    )
    origin = "the model of the stage before" if run.init else "the parts named above, with a new connector"
    held_out = numbers["held_out_loss"]
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
{rows}

| | |
|---|---|
| started from | {origin} |
| conversations | {config.mixture} |
| samples seen | {numbers["samples_seen"]:,} in {numbers["steps"]:,} steps ({numbers["tokens_seen"]:,} tokens) |
| optimizer, precision | {config.optimizer}, {config.precision} |
| schedule | {config.schedule} after {config.warmup_steps} warm-up steps |
| loss at the end | {numbers["last_loss"]} |
| held-out loss | {"not measured" if held_out is None else held_out} |
| seed | {config.seed} |

Data: `{run.inputs["prepare"][:12]}`. Run: `{run.fingerprint[:12]}`. TinyVLM {tinyvlm.__version__}. All settings are in
`recipe.json`, all inputs and numbers in `training.json`.
"""
