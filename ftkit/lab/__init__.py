"""Everything around an experiment: settings, results, widgets, runs and recorded studies."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "settings": [
            "Adapters",
            "Continual",
            "Contrastive",
            "Freezing",
            "FullFineTuning",
            "Prompting",
            "RowsAndDomains",
            "settings_of",
        ],
        "course.exercises": ["check", "grade", "hint", "solution", "without_reference", "yours_or_reference"],
        "course.guesses": ["how_far", "predict"],
        "course.progress": ["progress"],
        "kept.keeping": ["BestRun", "LastModel", "save_predictions"],
        "kept.loading": ["load_kept"],
        "baselines": ["logistic_regression", "majority_class", "mean_embeddings"],
        "scoreboard": ["Scoreboard"],
        "results": ["Outcome", "mean_figures", "method_entry", "results_table", "save_metrics"],
        "widgets.panel": ["panel"],
        "widgets.playground": ["chat_box", "playground"],
        "widgets.image_search": ["search_box"],
        "runs.notebooks": ["run_notebook"],
        "studies.study": ["load_study", "over_runs"],
        "studies.recording": ["run_study"],
    },
)
