"""The report of a run: runs/NAME/report.html, one page that needs no network.

    result_tables.py, result_charts.py    evaluate/results.json         -> quality of every model, against bytes and speed
    training_charts.py                    tensorboard/STAGE             -> loss, dev metrics, throughput
    run_tables.py                         DONE.json, sessions.jsonl,
                                          text/manifest.json, config    -> data, cost, versions, recipe
    charts.py                             a Chart                       -> SVG, by matplotlib
    page.py                               all of it and page.html       -> report.html

The report measures nothing: every number is read from a file of the run. Every text is escaped by the template.
"""

from distill.report.page import write_report

__all__ = ["write_report"]
