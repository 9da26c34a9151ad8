"""The small world that makes the laptop run real: drawn scenes, what is true of them, and tiny weights trained on them.

`scenes.py` draws, `world.py` speaks, `tokenizer.py` splits text, `train_weights.py` made the files in `weights/`
(figures in `weights/README.md`), `paths.weights_dir` finds them.
"""
