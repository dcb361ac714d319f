"""Table 3: mini-ImageNet 5-way 1-shot accuracy of the same five methods.

    python examples/paper/table3.py                                          reduced, on Glyphs: not mini-ImageNet
    python examples/paper/table3.py --data-dir <mini_imagenet>               reduced, on mini-ImageNet
    python examples/paper/table3.py --device cuda --data-dir <mini_imagenet> the paper's setting

Each method is a run folder: finished ones are not computed again, and a killed one goes on where it was.
"""

from _tables import Table, main

TABLE = Table(
    name="table3",
    title="mini-ImageNet",
    dataset="miniimagenet",
    cells=("5w1s",),
    stand_in="Glyphs are characters: this is not mini-ImageNet, and far easier.",
    paper={
        "maml": {"5w1s": "48.70 ± 1.84"},
        "fomaml": {"5w1s": "48.07 ± 1.75"},
        "reptile": {"5w1s": "49.97 ± 0.32"},
        "imaml-gd": {"5w1s": "48.96 ± 1.84"},
        "imaml-hf": {"5w1s": "49.30 ± 1.88"},
    },
)

if __name__ == "__main__":
    main(TABLE, __doc__ or "")
