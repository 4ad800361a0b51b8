"""The student: an encoder, its pooling and, once compressed, its head.

encoder.py   initialise from any encoder, from chosen layers of one, or from scratch
pooling.py   token states -> one vector
student.py   Student: tokens -> sentence vectors; saved as an ordinary model folder with student.json beside it
"""

from distill.student.student import Student

__all__ = ["Student"]
