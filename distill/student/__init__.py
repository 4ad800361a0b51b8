"""The student: an encoder, its pooling and, once compressed, its head.

encoder.py      an encoder, whole, some of its layers, or with new weights
pooling.py      token states -> one vector
student.py      Student: tokens -> text vectors; saved as a transformers folder with student.json in it
fingerprint.py  verifies the weights of a trained student
"""

from distill.student.student import Student

__all__ = ["Student"]
