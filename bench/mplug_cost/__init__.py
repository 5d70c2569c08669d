"""What a training step of mPLUG costs: the study's five methods by the library and literally, on both tasks."""
