"""The pipeline, a room a topic; the way in is `cli`, then `graph`, `runner` and `stages`."""
