"""What the pipeline does, a file a stage: each has `run(context) -> Result`."""
