"""The tracker: a block that follows a weight's largest singular directions from step to step."""
