"""A trained student as a folder that others load without this project.

student ──► sentence_transformers.py ──► transformer, pooling, dense head, normalise
        └─► onnx.py ──► int8.py ──────► onnx/model.onnx, onnx/model_int8.onnx        (config: export.formats)
                                         └─► check.py ──► card.py ──► folder.py: renamed to its name

formats.py   the files and what each needs: packages, and how near to the student it must be
check.py     their vectors, from the written files, held against the student's
card.py      README.md: files, how to load them, data, recipe, results, licence
folder.py    whole or absent
stage.py     the students of a run
"""
