"""Pages: what users name is shown as they named it."""

import pytest

from biomamba_jax import page


@pytest.mark.parametrize("name", ["a$b$c", "a$x_$", "_base", "$", "plain"])
def test_a_name_is_a_plot_s_title_and_label_as_it_is(name):
    def draw(axes):
        axes.plot([1, 2], label=page.label(name))
        axes.legend()

    svg = page.svg("title", draw)
    assert f"{name}</text>" in svg
    assert f"{name}</text>" in page.svg(name, lambda axes: None)
