"""`accelerate launch` on two CPU processes.

Its `--cpu` starts one, whatever `--num_processes` says; `--multi_gpu` starts both, which compute on the CPU where there
is no GPU to be seen.
"""

import sys

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of the launch."""


def launch_two_processes(port: int) -> list[str]:
    """The command up to the script."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "--main_process_port", str(port)]
