"""Fine-tunings as patches: bit for bit, whatever the types and however sharded; refused elsewhere; several at once."""

import copy
import math
import re

import pytest
import torch
from conftest import SHARDS
from ranks import run_ranks
from steps import through_a_file
from torch import nn

from popriskmin import PRM, Masked, apply_patch, param_groups, patch, patch_size

OPTIONS = {"lr": 0.01, "shrinkage": 4.0, "shrink_to": "start", "batch_size": 4, "n_dataset": 100}


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def prm(model, **options):
    return PRM(model.named_parameters(), **OPTIONS | {"weight_decay": 0.0} | options)


def tune(model, optimizer, seed=0, steps=8):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=generator).to(dtype)).square().sum().backward()
        optimizer.step()


def tuned(dtype=torch.float32, **how):
    model = base(dtype)
    optimizer = prm(model)
    tune(model, optimizer, **how)
    return model, optimizer


def assert_same_bits(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_restores_the_tuned_model_and_holds_what_changed_alone(dtype):
    model, optimizer = tuned(dtype)
    changes = patch(optimizer)
    assert list(changes)[:4] == ["0.weight.places", "0.weight.values", "0.weight.shape", "0.weight.start"]
    first = dict(base(dtype).named_parameters())
    for name, p in model.named_parameters():
        moved = (p != first[name]).flatten()
        assert moved.sum() > 0
        assert changes[f"{name}.values"].dtype == dtype
        assert torch.equal(changes[f"{name}.places"].long(), moved.nonzero()[:, 0])
    assert len(changes["0.weight.places"]) < 30
    other = base(dtype)
    assert apply_patch(other, changes) == {}
    assert_same_bits(other, model)


def test_it_is_saved_by_torch_and_by_safetensors(tmp_path):
    model, optimizer = tuned()
    loaded = [through_a_file(patch(optimizer))]
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(patch(optimizer), tmp_path / "patch.safetensors")
    loaded.append(safetensors.load_file(tmp_path / "patch.safetensors"))
    for changes in loaded:
        other = base()
        apply_patch(other, changes)
        assert_same_bits(other, model)


def test_signs_of_zero_and_nan_count_and_complex_weights_too():
    start = torch.tensor([[0.0, math.nan, 1.0, -0.0]])
    for values in (start, torch.complex(start, start)):
        p = nn.ParameterDict({"w": values.clone()})
        optimizer = prm(p)
        p["w"].grad = torch.zeros_like(p["w"])
        optimizer.step()
        p["w"].data[...] = values
        p["w"].data.view(-1)[0] = -p["w"].data.view(-1)[0]
        changes = patch(optimizer)
        assert changes["w.places"].tolist() == [0]
        other = nn.ParameterDict({"w": values.clone()})
        apply_patch(other, changes)
        assert_same_bits(other, p)


def test_layouts_tied_weights_and_what_was_never_stepped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.frozen = nn.Conv2d(2, 3, 2), nn.Linear(2, 2)
            self.tokens, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.tokens.weight
            self.frozen.requires_grad_(False)

    def made():
        torch.manual_seed(0)
        return Model().to(memory_format=torch.channels_last)

    model = made()
    optimizer = prm(model)
    assert all(len(x) == 0 for key, x in patch(optimizer).items() if key.endswith("places"))
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    changes = patch(optimizer)
    assert len(changes["frozen.weight.places"]) == 0
    other = made()
    apply_patch(other, changes)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    assert not other.conv.weight.is_contiguous()


class Compiled(nn.Module):
    """As torch.compile and DistributedDataParallel name what they wrap."""

    def __init__(self, model, name):
        super().__init__()
        self.add_module(name, model)


@pytest.mark.parametrize("name", ["_orig_mod", "module"])
def test_names_of_wrappers_do_not_count(name):
    for inner, outer in ((lambda m: m, lambda m: Compiled(m, name)), (lambda m: Compiled(m, name), lambda m: m)):
        model = base()
        optimizer = PRM(param_groups(inner(model), shrinkage=4.0), **OPTIONS | {"shrinkage": 0.0})
        tune(model, optimizer)
        other = base()
        apply_patch(outer(other), patch(optimizer))
        assert_same_bits(other, model)


def refused(model, changes, match, error=ValueError):
    before = copy.deepcopy(model)
    with pytest.raises(error, match=match):
        apply_patch(model, changes)
    assert_same_bits(model, before)


def test_another_base_is_refused_by_name_and_stays_as_it_was():
    changes = patch(tuned()[1])
    other = base()
    with torch.no_grad():
        other[2].weight[1, 2] += 1e-6
    refused(other, changes, "another model: 2.weight has other weights here than those training started from")
    tuned_already = base()
    apply_patch(tuned_already, changes)
    refused(tuned_already, changes, "0.weight has other weights here")
    other = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    other[0] = base()[0]
    refused(other, changes, re.escape("2.weight has shape (3, 5) there, (4, 5) here"))
    refused(nn.Sequential(base()[0]), changes, "this one has no parameter 2.weight")
    refused(base(torch.bfloat16), changes, "in another dtype: 0.weight is torch.float32 there, torch.bfloat16 here")


def test_what_is_no_patch_is_refused():
    changes = patch(tuned()[1])
    refused(base(), base().state_dict(), "not a patch of this version of popriskmin.patch: '0.weight' is not one")
    refused(base(), [changes], "a patch is a dict of tensors, as popriskmin.patch returns it, got list", TypeError)
    refused(base(), {k: v for k, v in changes.items() if k != "0.bias.values"}, "whole patch: 0.bias.values is missing")
    refused(base(), {**changes, "2.bias.places": torch.tensor([0, 1, 3])}, "damaged: the places of 2.bias do not fit")
    refused(base(), {**changes, "2.bias.places": torch.tensor([0])}, "damaged: the places of 2.bias do not fit")
    with pytest.raises(ValueError, match="at least one patch, got none"):
        apply_patch(base())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        apply_patch({}, changes)


def test_the_error_without_first_weights_says_what_to_set():
    model = base()
    message = "parameter 0.weight holds no first weights: build PRM with shrink_to='start', .* got shrink_to='zero'"
    optimizer = PRM(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        patch(optimizer)
    tune(model, optimizer)
    with pytest.raises(ValueError, match=message):
        patch(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 has none: build PRM from model.named_parameters\(\)"):
        patch(PRM(model.parameters(), **OPTIONS))
    with pytest.raises(TypeError, match="Masked keeps no first weights"):
        patch(Masked(torch.optim.SGD(model.named_parameters())))
    with pytest.raises(TypeError, match=r"patch needs a popriskmin\.PRM, got AdamW"):
        patch(torch.optim.AdamW(model.parameters()))


def test_a_checkpoint_keeps_what_the_patch_is_made_of():
    model, optimizer = tuned(steps=4)
    fresh = prm(model)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tune(model, fresh, seed=1)
    other = base()
    apply_patch(other, patch(fresh))
    assert_same_bits(other, model)


def test_several_patches_say_where_they_overlap():
    first, second = ({"0.weight": [1, 2], "2.bias": [0]}, {"0.weight": [2, 3, 4], "0.bias": [1]})
    made = []
    for number, changed in enumerate((first, second)):
        model = base()
        optimizer = prm(model)
        for name, p in model.named_parameters():
            p.grad = torch.zeros_like(p)
            p.grad.view(-1)[changed.get(name, [])] = 1.0 + number
        optimizer.step()
        made.append((model, patch(optimizer)))
    # The same gradient's sign moves a weight equally far in the first step: then they agree.
    other = base()
    assert apply_patch(other, made[0][1], made[1][1]) == {}
    made[1][1]["0.weight.values"][0] += 1
    other = base()
    with pytest.warns(UserWarning, match=r"the last one counts: 0.weight \(1 of 30\)$"):
        overlaps = apply_patch(other, made[0][1], made[1][1])
    assert {name: places.tolist() for name, places in overlaps.items()} == {"0.weight": [2]}
    expected = base()
    for name, p in expected.named_parameters():
        for model, changed in ((made[0][0], first), (made[1][0], second)):
            there = dict(model.named_parameters())[name]
            p.data.view(-1)[changed.get(name, [])] = there.data.view(-1)[changed.get(name, [])]
    expected[0].weight.data.view(-1)[2] = made[1][1]["0.weight.values"][0]
    assert_same_bits(other, expected)


def test_a_patch_says_which_lora_is_smaller():
    model, optimizer = tuned()
    changes = patch(optimizer)
    size = patch_size(changes)
    assert size.scalars == sum(p.numel() for p in model.parameters())
    assert size.changed == sum(len(x) for key, x in changes.items() if key.endswith(".places"))
    assert size.bytes == sum(x.numel() * x.element_size() for x in changes.values())
    # Rank 1 of LoRA for 5 x 6 and 3 x 5, in float32.
    assert size.lora_rank == size.bytes / (4 * (5 + 6 + 3 + 5))
    only_bias = {key: x for key, x in changes.items() if key.startswith("0.bias")}
    assert patch_size(only_bias).lora_rank == 0


def full(p):
    return getattr(p, "full_tensor", lambda: p)()


def _rank(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    for shard in (
        lambda model: fully_shard(model, mesh=mesh),
        lambda model: parallelize_module(model, mesh, {"0": RowwiseParallel(input_layouts=Replicate())}),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            model = base(dtype)
            shard(model)
            optimizer = prm(model)
            tune(model, optimizer)
            changes = patch(optimizer)
            gathered = [full(p) for p in model.parameters()]
            whole, sharded = base(dtype), base(dtype)
            shard(sharded)
            apply_patch(whole, changes)
            with torch.no_grad():
                sharded(torch.ones(1, 6, dtype=dtype))  # after which FSDP2 keeps parameters whole
            apply_patch(sharded, changes)
            for p, q, expected in zip(whole.parameters(), sharded.parameters(), gathered, strict=True):
                assert torch.equal(p, expected)
                assert torch.equal(full(q), expected)
            assert 0 < len(changes["0.weight.places"]) < 30
            x = torch.ones(1, 6, dtype=dtype)
            torch.testing.assert_close(sharded(x), whole(x), rtol=1e-3, atol=2e-3 if dtype == torch.bfloat16 else 1e-5)
            with pytest.raises(ValueError, match="0.weight has other weights here"):
                apply_patch(sharded, changes)
    _zero()


def _zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = base()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), PRM, **OPTIONS)
    tune(model, optimizer)
    with pytest.raises(ValueError, match=r"tensors; the other ranks hold the others\. patch needs them all"):
        patch(optimizer)


@pytest.mark.skipif(not SHARDS, reason="FSDP2 over gloo: see conftest.py")
def test_sharded_models_are_gathered_and_patched(tmp_path):
    run_ranks(tmp_path, 2, _rank)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_is_cast_after_training_is_patched_as_its_start_cast_alike(dtype):
    model = base()
    optimizer = prm(model)
    tune(model, optimizer)
    model.to(dtype)
    start = base().to(dtype)
    apply_patch(start, patch(optimizer))
    for now, restored in zip(model.parameters(), start.parameters()):
        assert torch.equal(now, restored)
