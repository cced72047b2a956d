"""The main job, `python -m rmtdamp`: what a learned damping does, on real data.

    data  ->  one training run per method and seed  ->  table, picture, JSON

`_data` reads, `_train` trains, `_report` shows. Needs the extra `rmtdamp[demo]`.
"""
