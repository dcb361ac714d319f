"""Table 2: Omniglot accuracy of iMAML (gradient descent, Hessian-free), MAML, first-order MAML and Reptile.

    python examples/paper/table2.py                                     reduced for a CPU, on Glyphs: about ten minutes
    python examples/paper/table2.py --data-dir <omniglot>               reduced, on Omniglot
    python examples/paper/table2.py --device cuda --data-dir <omniglot> the paper's setting
    python examples/paper/table2.py --cells 5w1s,20w1s --methods imaml-gd --minutes-per-cell 5

Each cell is a run folder: finished cells are not computed again, and a killed one goes on where it was.
"""

from _tables import Table, main

TABLE = Table(
    name="table2",
    title="Omniglot",
    dataset="omniglot",
    cells=("5w1s", "20w1s", "5w5s", "20w5s"),
    stand_in="Glyphs are characters drawn from fonts, which is easier than handwriting.",
    paper={
        "maml": {"5w1s": "98.7 ± 0.4", "5w5s": "99.9 ± 0.1", "20w1s": "95.8 ± 0.3", "20w5s": "98.9 ± 0.2"},
        "fomaml": {"5w1s": "98.3 ± 0.5", "5w5s": "99.2 ± 0.2", "20w1s": "89.4 ± 0.5", "20w5s": "97.9 ± 0.1"},
        "reptile": {"5w1s": "97.68 ± 0.04", "5w5s": "99.48 ± 0.06", "20w1s": "89.43 ± 0.14", "20w5s": "97.12 ± 0.32"},
        "imaml-gd": {"5w1s": "99.16 ± 0.35", "5w5s": "99.67 ± 0.12", "20w1s": "94.46 ± 0.42", "20w5s": "98.69 ± 0.1"},
        "imaml-hf": {"5w1s": "99.50 ± 0.26", "5w5s": "99.74 ± 0.11", "20w1s": "96.18 ± 0.36", "20w5s": "99.14 ± 0.1"},
    },
)

if __name__ == "__main__":
    main(TABLE, __doc__ or "")
