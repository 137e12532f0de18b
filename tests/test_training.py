"""The training loop: a run that is stopped anywhere and started again ends as the uninterrupted one does."""

import random
import re
import signal
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from torch import nn

import train_GTR
import train_prior_LIDC
from data import Loader
from metadata_manager import FlowConfig, LoopConfig, OptimizerConfig
from metrics.program import one_line_errors
from models import Validation, checkpoint, train_loop
from models.loading import refuse_other_settings
from models.processes import NonFiniteLoss, Processes, seed_step
from models.run import State, duration_text, moving_average
from models.training import learning_rate, settle_precision
from tests import tiny
from tests.tiny import assert_same_runs, checkpoints

STEPS = 3  # per epoch of the loop on its own
CPU = Processes(torch.device("cpu"))


class Pairs:
    """Two images per step, the third step of an epoch has one."""

    def __len__(self):
        return STEPS

    def __call__(self, step):
        generator = torch.Generator().manual_seed(1000 + step)
        return torch.rand(2, self.size(step), 1, 4, 4, generator=generator).unbind()

    def weight(self, step):
        return 1.0

    def size(self, step):
        return 1 if step % STEPS == 2 else 2

    def ids(self, step):
        return [f"image {step}{letter}" for letter in "ab"[:self.size(step)]]


def squares(model):
    """A loss with noise in it, so that a step repeats only if the loop seeds it."""

    def losses(done, image, masks):
        error = model(image) + 0.1 * torch.randn_like(image) - masks
        return [{"loss": error.square().mean()}]

    return losses


def at_call(number, action, losses):
    """`losses` that calls `action` while it computes call `number`, counted from 0."""
    calls = count()

    def acting(done, image, masks):
        terms = losses(done, image, masks)
        return action(terms) or terms if next(calls) == number else terms

    return acting


def train(folder, epochs=3, wrap=lambda losses: losses, settings=None, lr=0.01, seed=0, scores=(), ema=0.0,
          schedule="constant", clip=0.0, optimizer=torch.optim.Adam, **loop):
    """Trains a convolution in `folder`: its weights, a vector. scores: of the validations, else its bias."""
    seed_step(seed, -1)
    model, successive = nn.Conv2d(1, 1, 3, padding=1), iter(scores)

    def validate(validated):
        return Validation({"GED": next(successive, validated.bias.item())}, np.zeros((2, 2, 3), np.uint8))

    train_loop(model, wrap(squares(model)), optimizer(model.parameters(), lr), Pairs(), validate,
               folder=folder, about={"stage": "GTR", "config": {"lr": lr, **(settings or {})}},
               epochs=epochs, config=LoopConfig(**{"validate_every": 1, **loop}), seed=seed, processes=CPU,
               optimization=OptimizerConfig(lr=lr, schedule=schedule, clip=clip, ema=ema))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """TensorBoard numbers a process's event files and sorts those of one second by name: 10 before 9."""
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer._global_uid", AtomicCounter(10**6))


def log_lines(folder):
    """log.txt without dates, the number of epochs asked for, speed and memory."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [re.sub(r"^\S+ \S+ |/\d+(?=:)|  (\S+ images/s|memory).*", "", line) for line in lines]


def signal_at(step, number=signal.SIGTERM):
    return lambda losses: at_call(step, lambda terms: signal.raise_signal(number), losses)


# Stopped and started again.

@pytest.fixture(scope="module", params=[0.0, 0.9], ids=["plain", "averaged"])
def whole(request, tmp_path_factory):
    """An uninterrupted run: its decay of averages, folder and weights."""
    folder = tmp_path_factory.mktemp("whole")
    return request.param, folder, train(folder, save_model_step=1, ema=request.param)


@pytest.mark.parametrize("step", range(3 * STEPS))
def test_a_run_stopped_by_a_signal_at_any_step_repeats_the_uninterrupted_one(step, whole, tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, wrap=signal_at(step), save_model_step=1, ema=whole[0])
    assert checkpoint.load(tmp_path / "last.pt")["state"]["step"] == step + 1
    assert torch.equal(train(tmp_path, save_model_step=1, ema=whole[0]), whole[2])
    assert log_lines(tmp_path) == log_lines(whole[1])
    assert_same_runs(tmp_path, whole[1])


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_with_the_code_of_the_shell_after_the_step(number, code, tmp_path, capsys):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, wrap=signal_at(4, number))
    assert stop.value.code == code
    assert f"{signal.Signals(number).name} after step 5: saved" in capsys.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL
    signal.signal(number, before)


def test_a_second_signal_acts_at_once(tmp_path):
    def twice(terms):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not so in a background process
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, wrap=lambda losses: at_call(4, twice, losses))
    signal.signal(signal.SIGINT, before)
    assert checkpoint.load(tmp_path / "last.pt")["state"]["step"] == STEPS


def test_a_signal_during_a_validation_ends_the_run_after_it(tmp_path):
    def interrupted_scores():
        signal.raise_signal(signal.SIGTERM)
        yield 1.0

    with pytest.raises(SystemExit):
        train(tmp_path, epochs=1, scores=interrupted_scores())
    assert checkpoints(tmp_path) == ["best.pt", "last.pt"]


def test_a_run_ended_in_a_validation_goes_on_with_that_validation(tmp_path):
    done = []

    def scores(*values):
        for value in values:
            done.append("validation")
            yield value or 1 / 0

    def watched(losses):
        return lambda *batch: done.append("step") or losses(*batch)

    whole = train(tmp_path / "whole", scores=[3, 2, 1])
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", scores=scores(3, 0))
    done.clear()
    assert torch.equal(train(tmp_path / "parts", scores=scores(2, 1), wrap=watched), whole)
    assert done == ["validation", "step", "step", "step", "validation"]
    assert log_lines(tmp_path / "parts") == log_lines(tmp_path / "whole")
    assert_same_runs(tmp_path / "parts", tmp_path / "whole")
    assert [value for _, value in tiny.scalars(tmp_path / "parts")["validation/GED"]] == [3, 2, 1]


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("tried 2 GiB"), MemoryError("tried 2 GiB")])
def test_a_validation_without_memory_names_its_own_flag_after_what_was_trained_is_saved(error, tmp_path):
    def none_left():
        raise error
        yield

    with pytest.raises(SystemExit) as end, one_line_errors("--batch_size"):
        train(tmp_path, scores=none_left())
    assert "What helps: in validation: a smaller --val_samples (in proportion). (tried" in end.value.code
    assert checkpoint.load(tmp_path / "last.pt")["state"]["step"] == STEPS


@pytest.mark.parametrize("name", ["best.pt", "last.pt", "epoch_0001.pt"])
def test_a_run_ended_while_saving_keeps_every_checkpoint_it_promised(name, whole, tmp_path, monkeypatch):
    save = checkpoint.save

    def full(path, content):
        if path.name == name:
            raise OSError("disk full")
        save(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(checkpoint, "save", full)
        train(tmp_path, save_model_step=1, ema=whole[0])
    train(tmp_path, save_model_step=1, ema=whole[0])
    assert_same_runs(tmp_path, whole[1])
    assert len(checkpoints(tmp_path)) == 5


def test_more_epochs_go_on_from_the_last_and_keep_its_scalars(whole, tmp_path, capsys):
    train(tmp_path, epochs=1, ema=whole[0])
    with pytest.raises(SystemExit):
        train(tmp_path, wrap=signal_at(0), ema=whole[0])
    assert torch.equal(train(tmp_path, ema=whole[0]), whole[2])
    assert "going on after step 4" in capsys.readouterr().out
    assert [step for step, _ in tiny.scalars(tmp_path)["train/loss"]] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(tmp_path, wrap=signal_at(0))
    assert "already trained for 3 epochs" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("step", [0, 2, 3, 5, None])  # 2, 5: an epoch's last; None: stopped by its end
def test_an_older_checkpoint_is_gone_on_from(step, whole, tmp_path):
    if step is None:
        train(tmp_path, epochs=2, ema=whole[0])
    else:
        with pytest.raises(SystemExit):
            train(tmp_path, wrap=signal_at(step), ema=whole[0])
    tiny.to_older_form(tmp_path / "last.pt")
    assert torch.equal(train(tmp_path, ema=whole[0]), whole[2])
    assert log_lines(tmp_path) == log_lines(whole[1])


# Whose run it is.

def test_other_settings_are_refused_by_name_unless_they_do_not_alter_a_step(tmp_path):
    train(tmp_path, epochs=1, settings={"rank": 10, "gtr_weights": "a1", "data_path": "here"})
    train(tmp_path, epochs=2, settings={"rank": 10, "gtr_weights": "a1", "recompute": True})
    with pytest.raises(ValueError, match=r"last\.pt.*\(lr 0\.01 there, 0\.02 here; rank 10 there, 5 here\)"):
        train(tmp_path, settings={"rank": 5, "gtr_weights": "a1"}, lr=0.02)
    with pytest.raises(ValueError, match=r"\(over another GTR; rank 10 there, None here\)"):
        train(tmp_path)


@pytest.mark.parametrize("stage, trained, current, refused", [
    ("atfm", {"amp": False}, {"amp": "False"}, None),
    ("atfm", {"amp": False}, {"amp": "True"}, "amp False there, True here"),
    ("ssn", {"amp": False}, {"amp": "auto"}, None),  # which is in float32 anyway
    ("GTR", {}, {"backbone": "unet"}, None),
    ("GTR", {}, {"backbone": "mine"}, "backbone unet there, mine here"),
    ("GTR", {"epochs": 1}, {"epochs": 2}, None), ("GTR", {"nll_weight": 0.0, "groups": 1}, {}, None),
    ("GTR", {"epochs": 1, "loss": "energy"}, {"epochs": 2, "loss": "energy"}, "epochs 1 there, 2 here"),
    ("atfm", {"draws": 4}, {}, "trained with draws 4, which this version does not have"),
])
def test_settings_of_an_older_version_count_by_what_they_did(stage, trained, current, refused):
    content = {"stage": stage, "config": trained}
    if refused is None:
        return refuse_other_settings(content, current, Path("last.pt"))
    with pytest.raises(ValueError, match=rf"last\.pt: .*{refused}"):
        refuse_other_settings(content, current, Path("last.pt"))


def test_a_second_run_in_a_folder_is_refused_while_the_first_writes(tmp_path):
    def second(terms):
        with pytest.raises(ValueError, match="another run writes here"):
            train(tmp_path)

    train(tmp_path, wrap=lambda losses: at_call(1, second, losses))
    train(tmp_path, epochs=4)  # the lock has ended with the run


# What it leaves.

def test_only_last_best_and_each_nth_epoch_are_kept_and_the_last_is_validated(tmp_path):
    train(tmp_path, epochs=5, save_model_step=2, validate_every=2, scores=[2, 1, 3])
    epochs = {name: checkpoint.load(tmp_path / name)["state"]["epoch"] for name in checkpoints(tmp_path)}
    assert epochs == {"best.pt": 4, "epoch_0002.pt": 2, "epoch_0004.pt": 4, "last.pt": 5}
    assert [line for line in log_lines(tmp_path) if "validation" in line] == [
        "epoch 2 validation: GED 2", "epoch 4 validation: GED 1", "epoch 5 validation: GED 3"]


def test_no_checkpoint_is_written_if_none_is_wanted(tmp_path, capsys):
    weights = train(tmp_path / "without", save_model=False, save_model_step=1)
    assert checkpoints(tmp_path / "without") == []
    assert torch.equal(weights, train(tmp_path / "with"))
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", wrap=signal_at(1), save_model=False)
    assert "after step 2: nothing saved" in capsys.readouterr().err


def test_the_log_holds_means_over_images(tmp_path):
    values = iter([1.0, 4.0, 10.0])  # of 2, 2 and 1 images

    def constant(losses):
        return lambda *batch: [{"loss": 0 * losses(*batch)[0]["loss"] + next(values)}]

    train(tmp_path, epochs=1, wrap=constant)
    assert log_lines(tmp_path)[0].startswith("epoch 1: loss 4  gradient_norm 0  learning_rate 0.01")


def test_pieces_of_a_loss_add_up_to_the_whole(tmp_path):
    def in_pieces(losses):
        def pieces(done, image, masks):
            state = torch.get_rng_state()
            for weight in (0.25, 0.75):
                torch.set_rng_state(state)
                yield {"loss": weight * losses(done, image, masks)[0]["loss"]}

        return pieces

    torch.testing.assert_close(train(tmp_path / "pieces", wrap=in_pieces), train(tmp_path / "whole"))
    assert log_lines(tmp_path / "pieces")[0] == log_lines(tmp_path / "whole")[0]


def test_an_average_counts_weights_by_its_decay_and_early_ones_less():
    model, state = nn.ParameterList([torch.tensor([0.0])]), State()
    average = moving_average(model, 0.15, state)
    for state.step, value in ((1, 1.0), (2, 2.0)):
        model[0].data.fill_(value)
        average.update_parameters(model)
    # Decays are 1 / 11, then 0.15 < 2 / 12.
    assert average.module[0].item() == pytest.approx(0.15 * 10 / 11 + 0.85 * 2)


def test_the_average_is_validated_and_saved_while_the_weights_train_on(tmp_path):
    plain = train(tmp_path / "plain", epochs=1)
    assert torch.equal(train(tmp_path / "averaged", epochs=1, ema=0.9), plain)
    saved = checkpoint.load(tmp_path / "averaged" / "best.pt")
    assert saved["model"]["bias"].item() == saved["state"]["best"] != plain[-1].item()


# Learning rate and length of the gradient.

def test_the_learning_rate_falls_along_half_a_cosine_also_in_a_run_that_was_stopped(tmp_path):
    rates = [learning_rate(OptimizerConfig(lr=2.0, schedule="cosine"), step / 4) for step in range(4)]
    assert rates == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])
    assert learning_rate(OptimizerConfig(lr=2.0), 0.5) == 2.0
    cosine = {"schedule": "cosine", "settings": {"schedule": "cosine"}}
    weights = train(tmp_path / "whole", **cosine)
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", wrap=signal_at(4), **cosine)
    assert torch.equal(train(tmp_path / "stopped", **cosine), weights)
    assert not torch.equal(train(tmp_path / "constant"), weights)
    assert "learning_rate 0.00030154" in log_lines(tmp_path / "whole")[-2]  # of step 8 of 9


def test_long_gradients_are_shortened_and_logged_as_they_were(tmp_path):
    seed_step(0, -1)
    initial = nn.utils.parameters_to_vector(nn.Conv2d(1, 1, 3, padding=1).parameters()).detach()
    descent = {"optimizer": torch.optim.SGD, "lr": 1e-3, "epochs": 1}  # Adam forgets how long a gradient was
    free, loose = (train(tmp_path / f"{clip}", clip=clip, **descent) for clip in (0.0, 1e3))
    clipped = train(tmp_path / "clipped", clip=1e-2, **descent)
    assert torch.equal(free, loose)
    assert (clipped - initial).norm() <= STEPS * 1e-3 * 1e-2 * 1.01 < (free - initial).norm()
    norm, clipped_norm = (float(re.search(r"gradient_norm (\S+)", log_lines(tmp_path / name)[0])[1])
                          for name in ("0.0", "clipped"))
    assert clipped_norm == pytest.approx(norm, rel=0.02) and norm > 0.1


# Losses that are not finite.

def not_finite(terms):
    return [{"loss": terms[0]["loss"] * torch.nan}]


def infinite_gradient(terms):
    loss = terms[0]["loss"]
    return [{"loss": loss + (loss - loss.detach()).sqrt()}]  # 0 with an infinite slope


@pytest.mark.parametrize("step, bad, message", [
    (4, not_finite, "loss nan.* on the images image 4a; image 4b"),
    (5, not_finite, "loss nan.* on the images image 5a"),
    (5, infinite_gradient, r"loss 0\.\d+, gradient_norm (nan|inf) on the images image 5a"),
])
def test_what_is_not_finite_stops_and_names_the_images(step, bad, message, whole, tmp_path):
    message = rf"step {step}: {message}\. .*last\.pt is from before.*--skip_nonfinite"
    with pytest.raises(NonFiniteLoss, match=message):
        train(tmp_path, wrap=lambda losses: at_call(step, bad, losses), ema=whole[0])
    kept = checkpoint.load(tmp_path / "last.pt")["model"]
    assert all(weight.isfinite().all() for weight in kept.values())
    assert torch.equal(train(tmp_path, ema=whole[0]), whole[2])


@pytest.mark.parametrize("bad", [not_finite, infinite_gradient])
def test_batches_that_are_not_finite_are_left_out_and_counted_on_request(bad, tmp_path):
    def twice_in_the_second_epoch(losses):
        return at_call(3, bad, at_call(4, bad, losses))

    assert train(tmp_path, wrap=twice_in_the_second_epoch, skip_nonfinite=True).isfinite().all()
    counts = [re.findall(r"skipped_batches (\S+)", line) for line in log_lines(tmp_path) if "loss" in line]
    assert counts == [["0"], ["2"], ["0"]]


# Precision.

def test_auto_is_what_a_run_began_with_or_bfloat16_where_a_gpu_has_it(tmp_path, monkeypatch, capsys):
    cuda, asked = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.append(how) or has_it)
    for has_it in (False, True):
        assert settle_precision(FlowConfig(), tmp_path, cuda).amp == str(has_it)
    assert asked == [{"including_emulation": False}] * 2
    assert capsys.readouterr().out == "ST-Net's products are in bfloat16 (--amp False: the paper's float32)\n"
    assert settle_precision(FlowConfig(), tmp_path, CPU.device).amp == "False"
    for began in (False, "False"):  # the first as it was written until November 2026
        checkpoint.save(tmp_path / "last.pt", {"stage": "atfm", "model": {}, "config": {"amp": began}})
        assert settle_precision(FlowConfig(), tmp_path, cuda).amp == "False"
        assert "last.pt: goes on in float32, as it began (--amp False)" in capsys.readouterr().out
    assert settle_precision(FlowConfig(), tmp_path, CPU.device).amp == "False" and not capsys.readouterr().out
    assert settle_precision(FlowConfig(amp="True"), tmp_path, cuda).amp == "True"
    assert settle_precision(FlowConfig(method="ssn"), tmp_path, cuda).amp == "auto"  # has no such part
    checkpoint.save(tmp_path / "last.pt", {"stage": "atfm", "model": {}, "config": {"amp": "True"}})
    assert settle_precision(FlowConfig(), tmp_path, CPU.device).amp == "True"
    assert "goes on in bfloat16" in capsys.readouterr().out


# The training scripts themselves, on tiny data.

STAGES = {
    "GTR": (train_GTR, [*tiny.GTR, "--batchsize", "2", "--epochs", "2"]),
    "atfm": (train_prior_LIDC, [*tiny.PRIOR, "--batch_size", "2", "--num_epochs", "2"]),
}


def arguments(stage, lidc, run, folder):
    return [*STAGES[stage][1], *tiny.where(lidc, folder), "--save_model_step", "2", "--validate_every", "2",
            *(["--gtr", str(run / "GTR"), "--ema", "0.9"] if stage == "atfm" else [])]


@pytest.mark.parametrize("stage", STAGES)
def test_a_script_stopped_within_an_epoch_repeats_the_whole_run(stage, lidc, run, tmp_path, monkeypatch,
                                                                no_pictures):
    script = STAGES[stage][0]
    script.main(arguments(stage, lidc, run, tmp_path / "whole"))

    class Interrupting(Loader):
        def __call__(self, step):
            if step == 4:  # the second of three in the second epoch
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(step)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(script, "Loader", Interrupting)
        script.main(arguments(stage, lidc, run, tmp_path / "parts"))
    assert stop.value.code == 143
    script.main(arguments(stage, lidc, run, tmp_path / "parts"))
    assert_same_runs(tmp_path / "parts" / stage, tmp_path / "whole" / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_script_killed_at_random_moments_repeats_the_whole_run(stage, lidc, run, tmp_path, processes):
    def started(folder):
        process = processes.Process(target=STAGES[stage][0].main, args=(arguments(stage, lidc, run, folder),))
        process.start()
        return process

    begin = time.perf_counter()
    started(tmp_path / "whole").join()
    seconds = time.perf_counter() - begin
    kills, runs, moments = 0, 0, random.Random(0)
    while kills < tiny.KILLS:
        folder = tmp_path / f"parts{runs}"
        while True:
            process = started(folder)
            process.join(moments.uniform(0, seconds) if kills < tiny.KILLS else None)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
        runs += 1
        assert_same_runs(folder / stage, tmp_path / "whole" / stage)


def test_a_run_validated_otherwise_chooses_its_best_anew(tmp_path, capsys):
    train(tmp_path, epochs=2, scores=[1, 2], validate_every=1)
    train(tmp_path, epochs=3, scores=[3], validate_every=1)
    assert "anew" not in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "best.pt")["state"]["best"] == 1
    train(tmp_path, epochs=4, scores=[5], validate_every=1, val_images=2)
    assert "best.pt is chosen anew from the next validation on" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "best.pt")["state"]["best"] == 5


@pytest.mark.parametrize("seconds, steps, text", [
    (0.5, 10, "about 5 s for 10 steps"), (1, 3600, "about 60 min for 3,600 steps"),
    (1, 200_000, "about 56 h for 200,000 steps on this machine.* More than a day; .*--num_epochs"),
])
def test_how_long_it_takes_is_said(seconds, steps, text):
    assert re.match(text, duration_text(seconds, steps))
