from pipeline.command import starting

starting()
