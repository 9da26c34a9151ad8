"""From links to training samples: the stages that make data.

    links.py (routing.py) ─▶ download.py (downloader.py, fetch.py, decoding.py) ─┐
    pictures/: those that are already there ─────────────────────────────────────┴▶ preprocess.py
    preprocess.py ─┬▶ encode.py (placeholder signs, features) ─▶ prepare.py ─┐
                   └▶ explore.py (labels)                                    ├▶ conversations ─▶ mixture.py, packing.py
    a dataset's own files ─▶ records.py ─▶ sources/ ─────────▶ prepare.py ───┘

Each stage is a plain callable from table to table (see `tinyvlm.stage`); where it runs is decided in `ray_jobs`.
"""
