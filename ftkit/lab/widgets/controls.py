"""The controls of a panel: one widget per setting."""

import html
import math
from typing import Any

import ipywidgets

from ftkit.lab.schema import NotebookSettings, Parameter, in_words
from ftkit.plots import NO_MATH

_WIDEST_SLIDER = 100  # for a wider range of whole numbers the reader types the value

_ROUND_NUMBERS = (1, 1.5, 2, 3, 5, 7)  # times each power of ten, the positions of a logarithmic slider


class Control:
    """The control of one setting.

    Args:
        parameter: the setting.
        value: its value at the start.
        label_width: CSS width of its label.

    Attributes:
        widget: what the reader sees and changes.
    """

    def __init__(self, parameter: Parameter, value: Any, label_width: str) -> None:
        self.parameter, self._start = parameter, value
        self.widget = self._make(value, label_width)
        self._untouched = self.widget.value

    @property
    def value(self) -> Any:
        """The chosen value; text that the reader typed is not checked yet."""
        shown, parameter = self.widget.value, self.parameter
        if shown == self._untouched:
            return self._start  # exactly, even if the text in the widget loses digits or the type
        if isinstance(self.widget, ipywidgets.Text):
            items = [item.strip() for item in shown.split(",") if item.strip()]
            return items if parameter.kind == "list" else shown.strip() or None
        return shown

    def reset(self) -> None:
        """Set the value back to that at the start."""
        self.widget.value = self._untouched

    def _make(self, value: Any, label_width: str) -> ipywidgets.ValueWidget:
        parameter = self.parameter
        low, high = parameter.low, parameter.high
        shared = {
            "description": parameter.name,
            "tooltip": "; ".join(filter(None, [parameter.help, parameter.allowed_units])),
            "style": {"description_width": label_width},
            "layout": {"width": "auto"},
        }
        if parameter.choices:
            return ipywidgets.Dropdown(options=parameter.choices, value=value, **shared)
        if parameter.kind == "bool":
            return ipywidgets.Checkbox(value, **shared)
        if parameter.kind not in ("float", "int") or low is None or value is None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            return ipywidgets.Text(text, **shared)
        if parameter.kind == "int":
            kind = ipywidgets.IntSlider if high - low <= _WIDEST_SLIDER else ipywidgets.BoundedIntText
            return kind(value, min=low, max=high, **shared)
        # a FloatSlider moves to its nearest step as soon as a browser draws it: 0.07 would become 0.063
        options = [(in_words(position), position) for position in _positions(parameter, value)]
        return ipywidgets.SelectionSlider(options=options, value=value, **shared)


def make_controls(settings: NotebookSettings) -> dict[str, Control]:
    """Make the controls of a notebook's panel, by name and in the order of its ``PANEL``."""
    width = f"{max(map(len, settings.PANEL))}ch"
    parameters = {parameter.name: parameter for parameter in settings.parameters()}
    return {name: Control(parameters[name], getattr(settings, name), width) for name in settings.PANEL}


class StaticPanel:
    """The settings of a panel as a table, for notebooks that are executed with nobody to use the panel."""

    def __init__(self, settings: NotebookSettings) -> None:
        parameters = {parameter.name: parameter for parameter in settings.parameters()}
        self._rows = [
            (name, in_words(getattr(settings, name)), parameters[name].allowed_units, parameters[name].help)
            for name in settings.PANEL
        ]

    def __repr__(self) -> str:
        return "[control panel: " + ", ".join(f"{name} {value}" for name, value, *_ in self._rows) + "]"

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th scope="row" style="text-align: left">{html.escape(name)}</th>'
            + "".join(f'<td style="text-align: left">{html.escape(cell)}</td>' for cell in cells)
            + "</tr>"
            for name, *cells in self._rows
        )
        heads = "".join(
            f'<th scope="col" style="text-align: left">{head}</th>'
            for head in ("setting", "value", "allowed", "meaning")
        )
        return (
            f'<table class="ftkit-controls {NO_MATH}">'
            '<caption style="text-align: left">Static preview of the control panel: '
            "run this cell in JupyterLab to change the settings and press Train.</caption>"
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        )


def _positions(parameter: Parameter, start: float) -> list[float]:
    """Positions of a slider: the bounds, round numbers between them, and the start value with all its digits."""
    low, high = parameter.low, parameter.high
    if parameter.log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        inner = [float(f"{digits}e{power}") for power in powers for digits in _ROUND_NUMBERS]
    else:
        decimals = max(0, -math.floor(math.log10((high - low) / 20)))  # at least 20 positions
        inner = [round(low + i / 10**decimals, decimals) for i in range(int((high - low) * 10**decimals) + 1)]
    return sorted({low, high, start, *(position for position in inner if low < position < high)})
