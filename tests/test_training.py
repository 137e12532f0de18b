"""The training loop: a run that is stopped anywhere and started again ends as the uninterrupted one does."""

import multiprocessing
import random
import re
import signal
import time
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

import fig
from data import Batches
from metadata_manager import LoopConfig, RunConfig
from models import checkpoint, process, stages
from models.training import Average, NonFiniteLoss, Validation, fit
from tests import tiny

STEPS = 3  # per epoch of the loop on its own


class Pairs:
    """Two images per step, the third step of an epoch has one."""

    def __len__(self):
        return STEPS

    def __call__(self, step):
        generator = torch.Generator().manual_seed(1000 + step)
        b = len(self.ids(step))
        return torch.rand(b, 1, 4, 4, generator=generator), torch.rand(b, 1, 4, 4, generator=generator)

    def ids(self, step):
        return [f"image {step}a", f"image {step}b"][:1 if step % STEPS == 2 else 2]


def squares(model):
    """A loss with noise in it, so that a step repeats only if the loop seeds it."""

    def losses(image, masks, part):
        error = model(image) + 0.1 * torch.randn_like(image) - masks
        return [{"loss": error.square().mean()}]

    return losses


def at_call(number, action, losses):
    """`losses` that calls `action` while it computes call `number`, counted from 0."""
    calls = count()

    def acting(image, masks, part):
        terms = losses(image, masks, part)
        return action(terms) or terms if next(calls) == number else terms

    return acting


def train(folder, epochs=3, wrap=lambda losses: losses, settings=None, lr=0.01, seed=0, scores=None, ema=0.0,
          **loop):
    """Trains a convolution in `folder`: its weights, a vector. scores: of the validations, else its bias."""
    process.seed_step(seed, -1)
    model = nn.Conv2d(1, 1, 3, padding=1)
    successive = iter(scores or (model.bias.item() for _ in count()))
    fit(model, wrap(squares(model)), Pairs(),
        lambda: Validation({"GED": next(successive)}, np.zeros((2, 2, 3), np.uint8)), folder=folder,
        content={"stage": "GTR", "config": {"lr": lr, **(settings or {})}, "versions": {}},
        epochs=epochs, lr=lr, weight_decay=0.0, loop=LoopConfig(**{"validate_every": 1, **loop}), seed=seed,
        ema=ema)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def log_lines(folder):
    """log.txt without dates, speed and memory."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [re.sub(r"^\S+ \S+ |  images_per_second.*", "", line) for line in lines]


def signal_at(step, number=signal.SIGTERM):
    return lambda losses: at_call(step, lambda terms: signal.raise_signal(number), losses)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("step", range(3 * STEPS))
def test_a_run_stopped_by_a_signal_at_any_step_repeats_the_uninterrupted_one(step, ema, tmp_path):
    whole = train(tmp_path / "whole", save_model_step=1, ema=ema)
    with pytest.raises(SystemExit):
        train(tmp_path / "parts", wrap=signal_at(step), save_model_step=1, ema=ema)
    assert checkpoint.load(tmp_path / "parts" / "last.pt")["state"]["step"] == step + 1
    assert torch.equal(whole, train(tmp_path / "parts", save_model_step=1, ema=ema))
    assert log_lines(tmp_path / "parts") == log_lines(tmp_path / "whole")
    assert checkpoints(tmp_path / "parts") == checkpoints(tmp_path / "whole")
    for name in checkpoints(tmp_path / "whole"):
        ours, theirs = (checkpoint.load(tmp_path / run / name) for run in ("parts", "whole"))
        assert ours["state"] == theirs["state"]
        assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_the_code_of_the_shell_after_the_step(number, code, tmp_path, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, wrap=signal_at(4, number))
    assert stop.value.code == code
    assert f"{signal.Signals(number).name} after step 5: saved" in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, which it does not in a process started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path, interruptible):
    def twice(terms):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, wrap=lambda losses: at_call(4, twice, losses))
    assert checkpoint.load(tmp_path / "last.pt")["state"]["step"] == STEPS


def test_a_signal_during_a_validation_ends_the_run_after_it(tmp_path):
    def interrupted_scores():
        signal.raise_signal(signal.SIGTERM)
        yield 1.0

    with pytest.raises(SystemExit):
        train(tmp_path, epochs=1, scores=interrupted_scores())
    assert checkpoints(tmp_path) == ["best.pt", "last.pt"]


def fail(terms):
    raise ZeroDivisionError


@pytest.mark.parametrize("step", [0, 2, 4, 8])
def test_a_run_ended_by_an_exception_repeats_the_uninterrupted_one(step, tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", wrap=lambda losses: at_call(step, fail, losses))
    assert torch.equal(whole, train(tmp_path / "parts"))


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "epoch_0001.pt"])
def test_a_run_ended_while_saving_keeps_every_checkpoint_it_promised(name, tmp_path, monkeypatch):
    save = checkpoint.save

    def full(path, content):
        if path.name == name:
            raise OSError("disk full")
        save(path, content)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="disk full"):
        train(tmp_path, save_model_step=1)
    monkeypatch.undo()
    train(tmp_path, save_model_step=1)
    assert checkpoints(tmp_path) == ["best.pt", "epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt", "last.pt"]


def test_an_average_counts_weights_by_its_decay_and_early_ones_less():
    weight = nn.Parameter(torch.tensor([0.0]))
    average = Average(nn.ParameterList([weight]), decay=0.15)
    for step, value in enumerate((1.0, 2.0), start=1):
        weight.data.fill_(value)
        average.update(step)
    # Decays are 1 / 11, then 0.15 < 2 / 12.
    assert average.values[0].item() == pytest.approx(0.15 * 10 / 11 + 0.85 * 2)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay, tmp_path):
    with pytest.raises(ValueError, match="--ema"):
        train(tmp_path, ema=decay)


def test_the_average_is_validated_and_saved_while_the_weights_train_on(tmp_path):
    plain = train(tmp_path / "plain", epochs=1)
    assert torch.equal(train(tmp_path / "averaged", epochs=1, ema=0.9), plain)
    saved = checkpoint.load(tmp_path / "averaged" / "best.pt")
    assert saved["model"]["bias"].item() == saved["state"]["best"] != plain[-1].item()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    assert torch.equal(train(tmp_path / "a"), train(tmp_path / "b"))
    assert not torch.equal(train(tmp_path / "a"), train(tmp_path / "c", seed=1))


def test_every_step_of_every_seed_draws_other_numbers():
    def draw(seed, step):
        process.seed_step(seed, step)
        return float(torch.rand(()))

    assert len({draw(seed, step) for seed in (-1, 0, 1, 2**32) for step in range(-1, 20)}) == 4 * 21
    assert draw(1, 3) == draw(1, 3)


def test_more_epochs_go_on_from_the_last(tmp_path, capsys):
    whole = train(tmp_path / "whole", epochs=4)
    train(tmp_path / "parts", epochs=2)
    assert torch.equal(whole, train(tmp_path / "parts", epochs=4))
    assert "going on after step 6" in capsys.readouterr().out


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(tmp_path, wrap=lambda losses: at_call(0, fail, losses))
    assert "already trained for 3 epochs" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path, epochs=1, settings={"rank": 10})
    with pytest.raises(ValueError, match=r"last\.pt.*\(lr 0\.01 there, 0\.02 here; rank 10 there, 5 here\)"):
        train(tmp_path, settings={"rank": 5}, lr=0.02)
    with pytest.raises(ValueError, match="rank 10 there, None here"):
        train(tmp_path)


def test_settings_that_do_not_alter_a_step_may_differ(tmp_path):
    train(tmp_path, epochs=1, settings={"data_path": "here", "epochs": 1})
    train(tmp_path, epochs=2, settings={"data_path": "there", "epochs": 2})
    assert checkpoint.load(tmp_path / "last.pt")["state"]["step"] == 2 * STEPS


def test_a_second_run_in_a_folder_is_refused_while_the_first_writes(tmp_path):
    def second(terms):
        with pytest.raises(ValueError, match="another run writes here"):
            train(tmp_path)

    train(tmp_path, wrap=lambda losses: at_call(1, second, losses))
    train(tmp_path, epochs=4)  # the lock has ended with the run


def test_only_last_best_and_each_nth_epoch_are_kept(tmp_path):
    train(tmp_path, epochs=5, save_model_step=2, scores=[5, 3, 4, 6, 7])
    assert checkpoints(tmp_path) == ["best.pt", "epoch_0002.pt", "epoch_0004.pt", "last.pt"]
    epochs = {name: checkpoint.load(tmp_path / name)["state"]["step"] // STEPS
              for name in checkpoints(tmp_path)}
    assert epochs == {"best.pt": 2, "epoch_0002.pt": 2, "epoch_0004.pt": 4, "last.pt": 5}


def test_no_checkpoint_is_written_if_none_is_wanted(tmp_path, capsys):
    weights = train(tmp_path / "without", save_model=False, save_model_step=1)
    assert checkpoints(tmp_path / "without") == []
    assert torch.equal(weights, train(tmp_path / "with"))
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", wrap=signal_at(1), save_model=False)
    assert "after step 2: nothing saved" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["save_model_step", "validate_every", "val_images"])
def test_settings_below_one_are_refused_before_training(name, tmp_path):
    with pytest.raises(ValueError, match=f"--{name} 0: expected at least 1"):
        train(tmp_path, **{name: 0})


@pytest.mark.parametrize("stop_at", [None, 2 * STEPS])
def test_going_on_keeps_the_scalars_of_finished_epochs(stop_at, tmp_path):
    train(tmp_path, epochs=2)
    if stop_at is not None:
        with pytest.raises(SystemExit):
            train(tmp_path, epochs=4, wrap=signal_at(0))
    train(tmp_path, epochs=4)
    assert fig.read_scalars(tmp_path)["train/loss"][0].tolist() == [STEPS * epoch for epoch in (1, 2, 3, 4)]


def test_the_last_epoch_is_validated_whatever_the_interval(tmp_path):
    train(tmp_path, epochs=5, validate_every=2, scores=[3, 2, 1])
    assert [line for line in log_lines(tmp_path) if "validation" in line] == [
        "epoch 2 validation: GED 3", "epoch 4 validation: GED 2", "epoch 5 validation: GED 1"]


def test_the_log_holds_means_over_images(tmp_path):
    losses = iter([1.0, 4.0, 10.0])  # of 2, 2 and 1 images

    def constant(of_model):
        return lambda *batch: [{"loss": 0 * of_model(*batch)[0]["loss"] + next(losses)}]

    train(tmp_path, epochs=1, wrap=constant)
    assert log_lines(tmp_path)[0].startswith("epoch 1/1: loss 4  gradient_norm 0  learning_rate 0.01")


def test_parts_of_a_loss_add_up_to_the_whole(tmp_path):
    def in_parts(losses):
        def parts(image, masks, part):
            state = torch.get_rng_state()
            for share in (0.25, 0.75):
                torch.set_rng_state(state)
                yield {"loss": share * losses(image, masks, part)[0]["loss"]}

        return parts

    torch.testing.assert_close(train(tmp_path / "parts", wrap=in_parts), train(tmp_path / "whole"))
    assert log_lines(tmp_path / "parts")[0] == log_lines(tmp_path / "whole")[0]


def not_finite(terms):
    return [{"loss": terms[0]["loss"] * torch.nan}]


@pytest.mark.parametrize("step, names", [(4, "image 4a; image 4b"), (5, "image 5a")])
def test_a_loss_that_is_not_finite_stops_and_names_the_images(step, names, tmp_path):
    whole = train(tmp_path / "whole")
    message = rf"step {step}: loss nan.* on the images {names}\..*--skip_nonfinite"
    with pytest.raises(NonFiniteLoss, match=message):
        train(tmp_path / "parts", wrap=lambda losses: at_call(step, not_finite, losses))
    kept = checkpoint.load(tmp_path / "parts" / "last.pt")["model"]
    assert all(weight.isfinite().all() for weight in kept.values())
    assert torch.equal(whole, train(tmp_path / "parts"))


def infinite_gradient(terms):
    loss = terms[0]["loss"]
    return [{"loss": loss + (loss - loss.detach()).sqrt()}]  # 0 with an infinite slope


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 4: loss 0\.\d+, gradient_norm (nan|inf)"):
        train(tmp_path, wrap=lambda losses: at_call(4, infinite_gradient, losses))


@pytest.mark.parametrize("bad", [not_finite, infinite_gradient])
def test_batches_that_are_not_finite_are_left_out_and_counted_on_request(bad, tmp_path):
    def twice_in_the_second_epoch(losses):
        return at_call(3, bad, at_call(4, bad, losses))

    weights = train(tmp_path, wrap=twice_in_the_second_epoch, skip_nonfinite=True)
    assert weights.isfinite().all()
    counts = [re.findall(r"skipped_batches (\S+)", line) for line in log_lines(tmp_path) if "/3" in line]
    assert counts == [["0"], ["2"], ["0"]]


def test_an_unavailable_device_is_named():
    with pytest.raises(ValueError, match="--device cuda:99.*auto or cpu"):
        process.place(RunConfig(device="cuda:99"))
    assert process.place(RunConfig(device="cpu")) == torch.device("cpu")


# The stages themselves, on tiny data.

STAGES = {
    "GTR": (stages.train_gtr, [*tiny.GTR, "--batchsize", "2", "--epochs"]),
    "atfm": (stages.train_prior, [*tiny.PRIOR, "--batch_size", "2", "--num_epochs"]),
}


@pytest.fixture(scope="module")
def gtr(lidc, tmp_path_factory):
    """A trained GTR's folder."""
    folder = tmp_path_factory.mktemp("trained")
    stages.train_gtr("LIDC", ["--data_path", str(lidc), "--output_path", str(folder), *tiny.GTR,
                              "--epochs", "1"])
    return folder / "GTR"


def arguments(stage, lidc, gtr, folder, epochs):
    return [*STAGES[stage][1], str(epochs), "--data_path", str(lidc), "--output_path", str(folder),
            *(["--gtr", str(gtr)] if stage == "atfm" else []),
            "--save_model_step", "2", "--validate_every", "2"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_can_average_its_weights(stage, lidc, gtr, tmp_path):
    STAGES[stage][0]("LIDC", [*arguments(stage, lidc, gtr, tmp_path, 1), "--ema", "0.9"])
    found = checkpoint.load(tmp_path / stage / "last.pt", stage)
    pairs = list(zip(found["model"].values(), found["unaveraged"], strict=True))
    assert any(not torch.equal(averaged, weight) for averaged, weight in pairs)


def assert_same_runs(ours, theirs):
    """The same checkpoints with the same weights, optimizer states and best scores, bit for bit."""
    assert checkpoints(ours) == checkpoints(theirs)
    for name in checkpoints(theirs):
        a, b = checkpoint.load(ours / name), checkpoint.load(theirs / name)
        assert a["state"] == b["state"]
        for key, weight in b["model"].items():
            assert torch.equal(a["model"][key], weight)
        for number, moments in b["optimizer"]["state"].items():
            ours_of = a["optimizer"]["state"][number]
            assert all(torch.equal(ours_of[key], value) for key, value in moments.items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_stopped_within_an_epoch_repeats_the_whole_one(stage, lidc, gtr, tmp_path, monkeypatch):
    train_stage = STAGES[stage][0]
    train_stage("LIDC", arguments(stage, lidc, gtr, tmp_path / "whole", 2))

    class Interrupting(Batches):
        def __call__(self, step):
            if step == 4:  # the second of three in the second epoch
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(step)

    monkeypatch.setattr(stages, "Batches", Interrupting)
    with pytest.raises(SystemExit) as stop:
        train_stage("LIDC", arguments(stage, lidc, gtr, tmp_path / "parts", 2))
    assert stop.value.code == 143
    monkeypatch.undo()
    train_stage("LIDC", arguments(stage, lidc, gtr, tmp_path / "parts", 2))
    assert_same_runs(tmp_path / "parts" / stage, tmp_path / "whole" / stage)


@pytest.fixture(scope="module")
def processes():
    """Starts processes from one that has imported the project, so that each begins to train at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["models.stages"])
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_random_moments_repeats_the_whole_one(stage, lidc, gtr, tmp_path, processes):
    def start(folder):
        flags = arguments(stage, lidc, gtr, folder, 4)
        process = processes.Process(target=STAGES[stage][0], args=("LIDC", flags))
        process.start()
        return process

    started = time.perf_counter()
    start(tmp_path / "whole").join()
    seconds = time.perf_counter() - started
    kills, runs, moments = 0, 0, random.Random(0)
    while kills < tiny.KILLS:
        folder = tmp_path / f"parts{runs}"
        while True:
            process = start(folder)
            process.join(moments.uniform(0, seconds) if kills < tiny.KILLS else None)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        runs += 1
        assert_same_runs(folder / stage, tmp_path / "whole" / stage)
