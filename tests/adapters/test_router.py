"""The task router: each task trains only its own adapters and head."""

import copy

import pytest
import torch
from tiny_bert import make_rows, make_tiny_bert
from tiny_models import FAMILIES, LAYERS, WIDTH, disturb, make_inputs, make_tiny
from torch import nn

from ftkit.adapters.bottleneck import Bottleneck, add_adapters
from ftkit.adapters.router import TaskRouter
from ftkit.errors import TrainingError
from ftkit.training.loop import evaluate, fit
from ftkit.training.state import TrainSettings

TASKS = {"sentiment": {"width": 6, "num_labels": 2}, "topic": {"width": 3, "num_labels": 4}}


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, before):
    now = module.state_dict()
    assert now.keys() == before.keys()
    return all(torch.equal(now[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_routed(family):
    base, inputs = make_tiny(family), make_inputs(family)
    with torch.no_grad():
        before = base(**inputs).logits
        router = TaskRouter(base, TASKS)
        disturb(router)
        assert router("sentiment", **inputs).logits.shape == (3, 2)
        assert router("topic", **inputs).logits.shape == (3, 4)
        assert torch.equal(base(**inputs).logits, before)  # a forward pass does not change the base
    router("topic", **inputs).logits.square().sum().backward()
    for name, parameter in router.named_parameters():
        assert (parameter.grad is not None) == (name.startswith(("adapters.topic.", "heads.topic."))), name


def test_a_task_computes_the_same_as_a_model_with_its_adapters_and_head():
    base = make_tiny("bert")
    alone = add_adapters(copy.deepcopy(base), 6)
    router = TaskRouter(base, {"a": {"width": 6, "num_labels": 3}, "b": {"width": 6, "num_labels": 3}})
    disturb(router)
    for layer, adapter in zip(alone.bert.encoder.layer, router.adapters["a"], strict=True):
        layer.output.dense.adapter.load_state_dict(adapter.state_dict())
    alone.classifier.load_state_dict(router.heads["a"]["classifier"].state_dict())
    inputs = make_inputs("bert")
    with torch.no_grad():
        assert torch.equal(router("a", **inputs).logits, alone(**inputs).logits)
        assert not torch.allclose(router("b", **inputs).logits, router("a", **inputs).logits)


def test_all_trainable_weights_are_registered_and_match_the_formula():
    router = TaskRouter(make_tiny("bert"), TASKS)
    trained = {name: p.numel() for name, p in router.named_parameters() if p.requires_grad}
    assert all(name.startswith(("adapters.", "heads.")) for name in trained)
    sizes = {task: LAYERS * (2 * WIDTH * o["width"] + o["width"] + WIDTH) + (WIDTH + 1) * o["num_labels"]
             for task, o in TASKS.items()}  # fmt: skip
    for task, size in sizes.items():
        assert sum(number for name, number in trained.items() if f".{task}." in name) == size
    assert sum(trained.values()) == sum(sizes.values())


def test_training_one_task_leaves_the_other_and_the_base_bitwise_equal():
    router = TaskRouter(make_tiny_bert(), TASKS)
    base = weights(router.base)
    adapters = {task: weights(router.adapters[task]) for task in TASKS}
    heads = {task: weights(router.heads[task]) for task in TASKS}
    data = {"train": make_rows(48), "validation": make_rows(20, seed=1)}
    settings = TrainSettings(lr=0.02, num_epochs=2, keep_best=False, precision="fp32", class_weights="balanced")
    model = router.for_task("sentiment")
    history = fit(model, data, settings)
    trained = [*adapters["sentiment"].values(), *heads["sentiment"].values()]
    assert history.trainable_parameters == sum(tensor.numel() for tensor in trained)
    for name, tensor in router.adapters["sentiment"].state_dict().items():
        assert not torch.equal(tensor, adapters["sentiment"][name]), name
    assert not same(router.heads["sentiment"], heads["sentiment"])
    assert same(router.base, base)
    assert same(router.adapters["topic"], adapters["topic"]) and same(router.heads["topic"], heads["topic"])
    assert evaluate(model, data["validation"]).loss == pytest.approx(history.epochs[-1]["validation_loss"])
    assert evaluate(router.for_task("topic"), data["validation"]).probabilities.shape == (20, 4)


def test_alternating_batches_train_each_task_alone():
    router = TaskRouter(make_tiny("bert"), TASKS).train()
    optimizer = torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], lr=0.01)
    for task, other in [("topic", "sentiment"), ("sentiment", "topic")]:
        own, kept, base = weights(router.heads[task]), weights(router.heads[other]), weights(router.base)
        adapters = weights(router.adapters[other])
        router(task, **make_inputs("bert")).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not same(router.heads[task], own)
        assert same(router.heads[other], kept) and same(router.adapters[other], adapters) and same(router.base, base)


class DictRouter(nn.Module):
    """The mistake: adapters in a plain dict are not registered in the module."""

    def __init__(self, base):
        super().__init__()
        self.base, self.config = base.requires_grad_(False), base.config
        self.adapters = {"sentiment": Bottleneck(32, 6)}

    def forward(self, **batch):
        hidden = self.base.bert(**batch).last_hidden_state[:, 0]
        return type("Output", (), {"logits": self.base.classifier(self.adapters["sentiment"](hidden))})


def test_adapters_in_a_plain_dict_train_nothing():
    router = DictRouter(make_tiny_bert())
    start = weights(router.adapters["sentiment"])
    data = {"train": make_rows(16)}
    settings = TrainSettings(lr=0.02, num_epochs=1, warmup=0, precision="fp32")
    with pytest.raises(TrainingError, match="nothing to train"):
        fit(router, data, settings)
    router.base.classifier.requires_grad_(True)  # if something else trains, there is no error
    fit(router, data, settings)
    assert same(router.adapters["sentiment"], start)
    router.adapters = nn.ModuleDict(router.adapters)
    fit(router, data, settings)
    assert not same(router.adapters["sentiment"], start)


def test_a_router_is_saved_and_copied_as_one_module():
    router = TaskRouter(make_tiny("bert"), TASKS)
    disturb(router)
    other = TaskRouter(make_tiny("bert"), TASKS, seed=1)
    other.load_state_dict(router.state_dict())
    inputs = make_inputs("bert")
    with torch.no_grad():
        expected = router("topic", **inputs).logits
        assert torch.equal(other("topic", **inputs).logits, expected)
        twin = copy.deepcopy(router)
        disturb(twin)
        assert not torch.allclose(twin("topic", **inputs).logits, expected)
        assert torch.equal(router("topic", **inputs).logits, expected)


def test_a_failed_forward_pass_leaves_the_base_unchanged():
    router = TaskRouter(make_tiny("bert"), TASKS)
    inputs = make_inputs("bert")
    disturb(router)
    with torch.no_grad():
        before = router.base(**inputs).logits
        with pytest.raises(IndexError):
            router("topic", input_ids=inputs["input_ids"] + 100)
        assert torch.equal(router.base(**inputs).logits, before)


def test_a_routed_task_has_its_own_number_of_classes_and_the_mode_of_the_base():
    router = TaskRouter(make_tiny("bert"), TASKS)
    assert router.for_task("topic").config.num_labels == 4 and router.base.config.num_labels == 3
    assert not router.for_task("topic").training
    assert router.train().for_task("topic").training


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({}, "needs at least one task"),
        ({"a.b": {"width": 4, "num_labels": 2}}, "can't be named 'a.b'"),
        ({"train": {"width": 4, "num_labels": 2}}, "can't be named 'train'"),
        ({"a": {"width": 4}}, "give a width, and num_labels"),
        ({"a": {"width": 4, "num_labels": 1}}, "num_labels of 2 or more"),
        ({"a": {"width": 0, "num_labels": 2}}, "width of an adapter is 0"),
    ],
)
def test_invalid_tasks_are_refused(tasks, said):
    with pytest.raises(ValueError, match=said):
        TaskRouter(make_tiny("bert"), tasks)


def test_invalid_calls_and_bases_are_refused():
    router = TaskRouter(make_tiny("bert"), TASKS)
    with pytest.raises(ValueError, match="no task 'topics': choose from sentiment, topic"):
        router("topics", **make_inputs("bert"))
    with pytest.raises(ValueError, match="takes no labels"):
        router("topic", **make_inputs("bert"), labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="without adapters"):
        TaskRouter(add_adapters(make_tiny("bert"), 4), TASKS)
    with pytest.raises(ValueError, match="BertModel has no classification head"):
        TaskRouter(make_tiny("bert").bert, TASKS)
