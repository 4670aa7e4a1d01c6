"""What tests share: ranks as real processes, tiny models and checkpoints, planted faults."""
