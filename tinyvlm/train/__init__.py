"""Training: three stages that turn conversations into a model, each a plan carried out step by step.

    prepare folders ─measure─▶ lengths ─build─▶ plan ─step s, rank r─▶ packs ─assemble─▶ tensors ─▶ loop.py
                     (data.py)     (plan.py, order.py)           (data.py)    (batch.py)   (forward.py)

The order of samples is a pure function of (plan, step).  Whoever carries it out (one process, or several under Ray)
holds no position of its own: a checkpoint is weights, optimizer state and a step number (checkpoint.py), and random
numbers follow from seed, step and rank (seeds.py).  ledger.py proves what entered the model.
"""
