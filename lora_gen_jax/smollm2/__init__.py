"""The trained generator for SmolLM2-135M-Instruct; the README beside this file is its model card."""
