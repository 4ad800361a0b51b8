"""Several students of one teacher in one table.

A study is a folder of configs, one for each student, that share the shards of one run (`shards_from`) and a base.yaml. Each is
run by the pipeline, its evaluate stage included; the results of all runs together lie in their runs_dir:

    NAME.yaml, NAME/           the resolved config of a student, and its run
    results.json               every model at every size, as metrics/results.py has it
    table.txt, table.md        a row for each
    bytes.svg, speed.svg       quality against bytes per vector and against speed

With `evaluate.baselines` there are rows for the alternatives to training: the student before it, and the vectors of the teacher
and of the compressed students' initial models reduced by PCA.

study_configs.py   the students            study_rows.py   the rows of the table            study_charts.py   the charts
"""
