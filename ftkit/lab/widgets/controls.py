"""A widget for each setting."""

import html
import math
from typing import Any

import ipywidgets

from ftkit.lab.schema import NotebookSettings, Parameter, in_words

WIDEST_SLIDER = 100  # whole numbers on a slider; more of them are typed

ROUND = (1, 1.5, 2, 3, 5, 7)  # of each power of ten on a logarithmic slider


class Control:
    """The control of one setting.

    Attributes:
        widget: what the reader turns.

    Args:
        parameter: the setting.
        value: that it starts with.
        label_width: CSS width of its label.
    """

    def __init__(self, parameter: Parameter, value: Any, label_width: str) -> None:
        self.parameter, self._start = parameter, value
        self.widget = self._make(value, label_width)
        self._untouched = self.widget.value

    @property
    def value(self) -> Any:
        """What is set; not yet checked where it is typed as text."""
        shown, parameter = self.widget.value, self.parameter
        if shown == self._untouched:
            return self._start  # as it was, also where the text of it would say less
        if isinstance(self.widget, ipywidgets.Text):
            items = [item.strip() for item in shown.split(",") if item.strip()]
            return items if parameter.kind == "list" else shown.strip() or None
        return shown

    def reset(self) -> None:
        """Back to the start."""
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
            kind = ipywidgets.IntSlider if high - low <= WIDEST_SLIDER else ipywidgets.BoundedIntText
            return kind(value, min=low, max=high, **shared)
        # a slider of numbers moves to its nearest step as soon as a browser draws it: 0.07 would become 0.063
        places = [(in_words(place), place) for place in _places(parameter, value)]
        return ipywidgets.SelectionSlider(options=places, value=value, **shared)


def make_controls(settings: NotebookSettings) -> dict[str, Control]:
    """The controls of a notebook's panel by name, in the order of its ``PANEL``."""
    width = f"{max(map(len, settings.PANEL))}ch"
    parameters = {parameter.name: parameter for parameter in settings.parameters()}
    return {name: Control(parameters[name], getattr(settings, name), width) for name in settings.PANEL}


class StaticPanel:
    """A panel where nobody is there to use it: its controls as a table."""

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
            f'<th scope="col" style="text-align: left">{head}</th>' for head in ("setting", "value", "can be", "is")
        )
        return (
            '<table class="ftkit-controls"><caption style="text-align: left">The control panel, as an image: '
            "run this cell in JupyterLab to turn these and press Train.</caption>"
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        )


def _places(parameter: Parameter, start: float) -> list[float]:
    """What a slider can be set to: round values within the bounds, the bounds, and the start with all its digits."""
    low, high = parameter.low, parameter.high
    if parameter.log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        inner = [float(f"{digits}e{power}") for power in powers for digits in ROUND]
    else:
        decimals = max(0, -math.floor(math.log10((high - low) / 20)))  # at least 20 places
        inner = [round(low + i / 10**decimals, decimals) for i in range(int((high - low) * 10**decimals) + 1)]
    return sorted({low, high, start, *(place for place in inner if low < place < high)})
