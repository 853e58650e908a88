"""Pages: what users name is shown as they named it."""

import pytest

from biomamba_jax import html


@pytest.mark.parametrize("name", ["a$b$c", "a$x_$", "_base", "$", "plain"])
def test_a_name_is_a_plot_s_title_and_label_as_it_is(name):
    def draw(axes):
        axes.plot([1, 2], label=html.label(name))
        axes.legend()

    svg = html.svg("title", draw)
    assert f"{name}</text>" in svg
    assert f"{name}</text>" in html.svg(name, lambda axes: None)
