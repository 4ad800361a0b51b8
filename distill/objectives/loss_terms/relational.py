"""relational: the similarities between the texts of a global batch, as the teacher has them. Relational knowledge distillation
(arXiv 1904.05068), of distributions as in ConGen:

    L_i = - sum_j  softmax_j(t_i.t_j / tau_t)  log softmax_j(z_i.z_j / tau_s)        j: the batch without i

z: the students' vectors, cut to one of the nested sizes and L2-normalised; the mean over sizes. t: the teacher's, at full
width, so that a short vector learns what it should keep, not what the first components happen to hold. Unlike ConGen, whose
keys are the teacher's vectors, both vectors of a similarity are the student's, so that its axes are free.

The teacher's similarities may be those of partly whitened vectors (arXiv 2103.15316 whitens in full), which depend on more of
its directions: `whitening_map`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from distill.objectives.loss_terms.base import BatchTerm


class Relational(BatchTerm):
    """The mean over nested sizes of L_i. Options: student_temperature, teacher_temperature.

    whitening: a map [d_t, d_t] of the teacher's vectors before their similarities are taken; None takes them as they are.
    """

    name = "relational"
    tasks = ("hpd",)
    whitening: Tensor | None = None

    def losses(self, vectors: Tensor, teacher: Tensor, rows: Tensor, nested: Sequence[int]) -> tuple[Tensor, Tensor]:
        if self.whitening is not None:
            teacher = normalize(teacher.float() @ self.whitening.T.to(teacher.device), dim=-1)
        temperatures = {name: getattr(self.options, name) for name in ("student_temperature", "teacher_temperature")}
        return relational_losses(vectors, teacher, rows, sizes=nested, **temperatures)


def relational_losses(
    vectors: Tensor,
    teacher: Tensor,
    rows: Tensor,
    *,
    sizes: Sequence[int],
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """The losses of the requested rows, [B], whose gradients reach all vectors; and the entropies of their labels, [B], below
    which no student gets.

    vectors [G, d], not normalised; teacher [G, d_t], L2-normalised; rows [B] int64: which of the G.
    """
    own = torch.zeros(len(rows), len(vectors), dtype=torch.bool, device=vectors.device)
    own[torch.arange(len(rows), device=rows.device), rows] = True
    lowest = torch.finfo(vectors.dtype).min  # -inf times a label of 0 is no number

    def among_others(similarities_bg: Tensor, temperature: float) -> Tensor:
        return (similarities_bg / temperature).masked_fill(own, lowest)

    teacher = teacher.to(vectors.dtype)
    label_logits_bg = among_others(teacher[rows] @ teacher.T, teacher_temperature)
    labels_bg = label_logits_bg.softmax(dim=1)
    of_sizes = []
    for size in sizes:
        cut_gd = normalize(vectors[:, :size], dim=1)
        logits_bg = among_others(cut_gd[rows] @ cut_gd.T, student_temperature)
        of_sizes.append(cross_entropy(logits_bg, labels_bg, reduction="none"))
    return torch.stack(of_sizes).mean(dim=0), cross_entropy(label_logits_bg, labels_bg, reduction="none")


def whitening_map(components: Tensor, eigenvalues: Tensor, power: float) -> Tensor:
    """M [d, d], for x -> M x: the directions of the x, each divided by its standard deviation to this power; 1 whitens.

    components [d, d], eigenvalues [d]: the whole PCA of the x, largest first. Directions in which the x hardly differ, those
    below a millionth of the largest variance, count as that: they hold rounding alone.
    """
    deviations = eigenvalues.clamp(min=1e-6 * float(eigenvalues[0])).sqrt()
    return components / deviations[:, None] ** power
