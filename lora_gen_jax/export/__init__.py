"""Specializations in the formats of other programs: PEFT adapters, Hugging Face models, llama.cpp adapters."""
