"""A control for each setting of a panel, made from its schema: labelled, within its bounds, reached by keyboard."""

import html
import math
from typing import Any

import ipywidgets

from ftkit.schema import NotebookSettings, Parameter, in_words

WIDEST_SLIDER = 100  # whole numbers on a slider; more of them are typed


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
            return self._start  # with all its digits
        if isinstance(self.widget, ipywidgets.Text):
            items = [item.strip() for item in shown.split(",") if item.strip()]
            return items if parameter.kind == "list" else shown.strip() or None
        if parameter.kind == "float":
            for bound in (parameter.low, parameter.high):
                if math.isclose(shown, bound):
                    return bound  # with all its digits
            # a slider at 10**-3.5 means the 3.2e-4 beside it, not 0.00031622776601683794
            tidy = float(f"{shown:.2g}") if parameter.log else round(shown, _decimals(parameter))
            return min(max(tidy, parameter.low), parameter.high)
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
        if parameter.log:
            bounds = {"min": math.log10(low), "max": math.log10(high)}
            return ipywidgets.FloatLogSlider(value, **bounds, step=0.1, readout_format=".1e", **shared)
        decimals = _decimals(parameter)
        readout = {"step": 10.0**-decimals, "readout_format": f".{decimals}f"}
        return ipywidgets.FloatSlider(value, min=low, max=high, **readout, **shared)


def make_controls(settings: NotebookSettings) -> dict[str, Control]:
    """The controls of a notebook's panel by name, in the order of its ``PANEL``."""
    width = f"{max(map(len, settings.PANEL))}ch"
    parameters = {parameter.name: parameter for parameter in settings.parameters()}
    return {name: Control(parameters[name], getattr(settings, name), width) for name in settings.PANEL}


class Picture:
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
            '<table class="ftkit-controls"><caption style="text-align: left">The control panel, as a picture: '
            "run this cell in JupyterLab to turn these and press Train.</caption>"
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        )


def _decimals(parameter: Parameter) -> int:
    """Decimals of a float on a slider that has at least 20 places."""
    return max(0, -math.floor(math.log10((parameter.high - parameter.low) / 20)))
