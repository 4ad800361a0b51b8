"""Evaluation of models: STS, retrieval, transfer and fidelity to the teacher, as ModelResults of metrics/results.py.

    model_encoder.py   a folder or hub name -> texts to vectors, on one rank or all; texts per second
    tasks.py           folders or hub names -> Tasks: the loaded evaluation sets, and the scores of vectors on them
    retrieval.py       RetrievalSet -> ndcg@10, ...; index_types.py: with quantised vectors and graphs, through faiss
    transfer.py        TransferSet -> accuracy of a logistic regression
    overlap.py         how many texts of the sets a run was trained on
    mteb_tasks.py      tasks of the mteb library, by its names or from files
    compare.py         two results -> paired differences with intervals
    score_tables.py    results -> tables
    evaluate_stage.py  teacher and exports of a run -> evaluate/results.json, neighbours.json, index.npy
    neighbours.py      where student and teacher agree on neighbours, and where they differ most
    passage_index.py   the search index of a run's own text

The sets are read by corpus/evaluation_sets.py; STS, fidelity and the bootstrap are in metrics/.
"""
