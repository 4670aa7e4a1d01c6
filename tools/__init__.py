from pipeline.reporting.command import starting

starting()
