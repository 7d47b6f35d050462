"""A Bokeh server application: what its page shows is computed here and arrives by WebSocket only."""

from bokeh.io import curdoc
from bokeh.layouts import column
from bokeh.models import ColumnDataSource, Div, Slider
from bokeh.plotting import figure

answer = Div(text="Move the slider.", name="answer")
ticks = Div(text="no tick yet", name="ticks")
slider = Slider(title="Number", start=0, end=20, step=1, value=6)
data = ColumnDataSource({"x": list(range(11)), "y": [6 * x for x in range(11)]})
plot = figure(height=260, width=600, title="Multiples")
plot.line("x", "y", source=data, line_width=3)

count = 0


def on_slide(_attribute: str, _old: int, new: int) -> None:
    answer.text = f"{new} squared is {new * new}"
    data.data = {"x": list(range(11)), "y": [new * x for x in range(11)]}


def on_tick() -> None:
    global count
    count += 1
    ticks.text = f"tick {count}"


slider.on_change("value", on_slide)
curdoc().add_root(column(slider, answer, ticks, plot))
curdoc().add_periodic_callback(on_tick, 200)
