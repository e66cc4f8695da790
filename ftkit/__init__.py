"""ftkit: learn fine-tuning by measuring it.

Nothing is imported here, so that ``import ftkit`` costs nothing. Import what you need from its rooms::

    from ftkit.data import load_text
    from ftkit.models import load_classifier
    from ftkit.training import TrainSettings, fit
"""

__version__ = "0.2.0"

TIERS = ("smoke", "cpu", "gpu")  # seconds for tests; two cores and 8 minutes; a hub-size model on a GPU
