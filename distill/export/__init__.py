"""A trained student as a folder that others load without this project.

sentence_transformers.py   transformer, pooling, dense head, normalise; checked against the student before it appears
card.py                    README.md of the folder: data, recipe, results, size, licence
"""
