"""What the fork server imports; run, a stand-in for Python: `-m tests.support.preloaded -m MODULE ARGUMENT...`.

Objects made so far are exempt from garbage collection, whose walks over them would cost each fork more than its work.
"""

import gc
import sys
from importlib import import_module

for _name in (
    "deepspeed",
    "peft",
    "pipeline.build",
    "pipeline.evaluation.entry",
    "pipeline.export.formats",
    "pipeline.training.session",
    "pytest",
    "tests.support.commands",
    "tests.support.tiny_models",
    "tools.support.parity",
    "torch.distributed.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
):
    import_module(_name)
gc.collect()
gc.freeze()

if __name__ == "__main__":
    from tests.support.commands import become

    become(sys.argv[1:])
