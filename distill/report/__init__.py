"""A run on one page that needs no network: runs/NAME/report.html.

    quality.py   evaluate/results.json                  -> the result tables, quality against bytes and speed
    curves.py    tensorboard/STAGE                      -> loss and dev curves
    run.py       text/manifest.json, DONE.json,
                 sessions.jsonl, config.yaml            -> the data card, the cost, the recipe, the versions
    chart.py     a Chart                                -> inline SVG
    write.py     all of it, page.html, style.css        -> report.html

Every number on it is of a file of the run; every text goes through the template's escaping.
"""

from distill.report.write import write_report

__all__ = ["write_report"]
