"""What the pictures of a run show."""

import pytest

import implicitlayer as il


@pytest.mark.parametrize("seconds", [0.0, 0.3, 600.0])
def test_a_history_with_one_point_lies_inside_of_its_picture(seconds: float) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    record = {"seconds": seconds, "accuracy": 1.0, "validation": 1.0, "validation_interval": 0.0}
    il.meta.plot_learning_curves(axes, {"one": [record]})
    low, high = axes.get_xlim()
    assert low == 0 and low <= seconds / 60 < high
    points = axes.containers[0].lines[0]
    assert points.get_xdata().tolist() == [seconds / 60] and not points.get_clip_on()
    pyplot.close(figure)
