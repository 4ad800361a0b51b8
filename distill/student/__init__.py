"""The student: an encoder, its pooling and, once compressed, its head.

initial.py      the student as training begins: a model's encoder with the settings of its folder
encoder.py      an encoder, whole, some of its layers, or with new weights
settings.py     what a sentence-transformers folder says besides: pooling, dense layers, prompts, lengths
pooling.py      token states -> one vector
student.py      Student: tokens -> text vectors; saved as a transformers folder with student.json in it
fingerprint.py  verifies the weights of a trained student
"""

from distill.student.student import Student

__all__ = ["Student"]
