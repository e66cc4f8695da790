"""Prompted language models: scoring, few-shot examples, soft prompts and supervised fine-tuning (lesson 04)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "templates": ["Template", "Verbalizer", "content_free_rows", "encode_prompts", "token_table"],
        "scoring": ["calibrate", "score", "to_evaluation"],
        "few_shot": ["balanced_examples", "nearest_examples", "random_examples"],
        "classifier": ["PromptClassifier"],
        "soft_prompts": ["add_p_tuning", "add_prefix_tuning", "add_prompt_tuning", "nearest_words"],
        "sft": ["CompletionModel", "encode_completions"],
    },
)
