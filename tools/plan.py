"""Plan a run before it is paid for: memory, communication and predicted time of a step on any number of GPUs.

    python tools/plan.py --model ViT-bigG-14 --gpus 8,64,512,4096 --gpu-memory 80 --batch 32 --zero 1,2,3
    python tools/plan.py --model ViT-L-14 --gpus 16 --batch 64 --network bandwidth=12.5,latency=20 options.vote=lagged
    python tools/plan.py --model llava-1.5-13b --gpus 8,64,512,4096 --batch 8 --tokens 700 --answer-tokens 64
    python tools/plan.py --model FOLDER --gpus 16 --batch 8 --recipe coin

Everything comes from shapes on the meta device, the run configuration and the DeepSpeed configuration: nothing is
downloaded, allocated or trained, and no counter of a run is read. Memory and bytes follow the code and were checked
against real runs of up to four ranks; times are predictions. docs/planner.md lists the assumptions.
"""

import sys

from r1p_dist.planner.main import main

if __name__ == "__main__":
    sys.exit(main(__doc__, sys.argv[1:]))
