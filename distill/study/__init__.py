"""Trains and compares several students of one teacher.

A study is a folder of configs, one for each student, that share the shards of one run (`shards_from`) and a base.yaml. Each is
run by the pipeline, its evaluate stage included; the combined results are written to the configs' common runs_dir:

    NAME.yaml, NAME/           the resolved config of a student, and its run
    results.json               every model at every size, in the format of metrics/results.py
    table.txt, table.md        a row for each model and size
    bytes.svg, speed.svg       quality against bytes per vector and against speed

With `evaluate.baselines` there are rows for the alternatives to training: each student before training, the teacher's vectors
reduced by PCA and, for each compressed student, its initial model's vectors reduced by PCA.

study_configs.py   the students            study_rows.py   the rows of the table            study_charts.py   the charts
"""
