"""From links to training samples: the stages that make data.

    links.py ─▶ download.py (fetch.py, addresses.py) ─▶ preprocess.py ─▶ encode.py ─▶ prepare.py

Each stage is a plain callable from table to table (see `tinyvlm.stage`); where it runs is decided in `ray_jobs`.
"""
