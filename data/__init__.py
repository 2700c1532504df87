"""The data stage: from source code to token shards. `python -m data.prepare configs/data/local.py`."""
