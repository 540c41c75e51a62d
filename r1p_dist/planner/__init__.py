"""What a run will need and how long its steps will take, from shapes alone: nothing is trained and no counter read."""
