"""Two machines: two rendezvous agents of `accelerate launch` on the loopback, one process each, by gloo on the CPU."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import safetensors.torch
from conftest import ROOT

import dpo_train
import sft_train

COMMON = ["--demo", "--max_steps", "3", "--batch", "2", "--learning_rate", "1e-3", "--save_steps", "9"]
COMMON += ["--no_4bit", "--no_baseline_cache", "--output_dir", "run", "--exp_log", "log.jsonl"]
SFT = [
    *COMMON,
    "--dataset",
    "twix.jsonl",
    "--sample_ratio",
    "1",
    "--val_split",
    "0.1",
    "--mtbench_ru",
    "none",
    "--skip_baseline_eval",
]
SFT += ["--max_seq_length", "48", "--kl_coef", "0.2", "--kl_start_step", "0", "--kl_warmup_steps", "2"]
SFT += ["--kl_limit_seq", "16", "--lora_dropout", "0"]
DPO = [*COMMON, "--limit_pairs", "24", "--eval_pairs", "0", "--no-do_eval", "--no-eval_baseline", "--lora_dropout"]
DPO += ["0", "--mtbench_limit", "1", "--mtbench_max_tokens", "2", "--instruct_limit", "1", "--instruct_max_tokens"]
DPO += ["2", "--retention_limit", "0"]
SCRIPTS = {"sft": (sft_train, SFT), "dpo": (dpo_train, DPO)}


def on_two_machines(folders, script, argv):
    """What each of two agents, started in its folder, printed; exit codes and texts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
    launch += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    agents = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), script, *argv], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    try:
        texts = [agent.communicate(timeout=600)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [agent.returncode for agent in agents], texts


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shared"), [("sft", True), ("sft", False), ("dpo", True)])
def test_two_machines_end_with_one_process_s_adapter(name, shared, dataset, tmp_path, monkeypatch):
    """A folder that the second machine does not see is named in one line, and the run goes on without it."""
    module, argv = SCRIPTS[name]
    first, second, one = (tmp_path / each for each in ("first", "second", "one"))
    for folder in (first, second, one):
        folder.mkdir()
        shutil.copy(dataset, folder)
    folders = [first, first if shared else second]
    codes, texts = on_two_machines(folders, module.__file__, [*argv, "--grad_acc", "1"])
    assert codes == [0, 0], "".join(texts)[-4000:]
    assert [text.count("is not shared: process 1 has") for text in texts] == [0 if shared else 1, 0]
    assert json.loads((first / "run" / "run.json").read_text("utf-8"))["device"]["processes"] == 2
    monkeypatch.chdir(one)
    module.main([*argv, "--grad_acc", "2"])
    a, b = (safetensors.torch.load_file(folder / "run" / "adapter_model.safetensors") for folder in (first, one))
    distance = sum((a[name] - b[name]).norm() ** 2 for name in b) ** 0.5
    norm = sum(tensor.norm() ** 2 for tensor in b.values()) ** 0.5
    print(f"{name}, shared {shared}: distance over norm {distance / norm:.2e}")
    assert a.keys() == b.keys() and norm > 0 and distance <= 1e-4 * norm
    if not shared and name == "sft":
        codes, texts = on_two_machines(folders, module.__file__, [*argv, "--resume_from_checkpoint", "auto"])
        assert 0 not in codes and "name one that all machines share" in texts[0]
