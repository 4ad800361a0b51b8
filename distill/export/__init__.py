"""A trained student as a folder that others load without this project.

student ──► sentence_transformers.py ──► transformer, pooling, dense head, normalise
        └─► onnx.py ──► int8.py ──────► onnx/model.onnx, onnx/model_quantized.onnx        (config: export.formats)
                                         └─► check.py ──► card.py ──► folder.py: renamed to its name

formats.py        the files of each format, the packages it needs, its lowest cosine to the student
check.py          verifies vectors from the written files against the student's
card.py           README.md: files, how to load them, data, recipe, licence; the report stage adds results
folder.py         the folder, whole or absent
export_stage.py   the students of a run
"""
