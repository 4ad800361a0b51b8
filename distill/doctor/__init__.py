"""Whether a run would work here, found out before anybody waits for it.

    start.py       what the launcher knows of this process, and what the environment says
    checks.py      all checks. A check is a module with
                     look(start) -> Facts               what a node finds of itself, JSON-able; it may hang, or raise
                     judge(start, nodes) -> Findings    what is wrong and how it is mended, from what all nodes found; pure
                     note(facts) -> str                 a node that is well, in a few words
    notices.py     reports from rank to rank over the run directory
    meeting.py     the same over the network; then an all-reduce, timed
    consult.py     looks, reports, and on rank 0 waits for the others' reports, all of it within 20 s
    diagnosis.py   from the reports, and from those that did not come, to findings
    table.py       what rank 0 prints

Either way of reporting finds the faults of the other: a node whose network is cut is heard over the run directory, one that
sees another run directory over the network.
"""

from distill.doctor.consult import examine, report_to_rank_0
from distill.doctor.diagnosis import Diagnosis
from distill.doctor.start import Start
from distill.doctor.table import printed

__all__ = ["Diagnosis", "Start", "examine", "printed", "report_to_rank_0"]
