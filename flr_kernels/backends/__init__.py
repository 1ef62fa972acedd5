"""What ops share: Triton's configuration and launch, and the compiled extension."""
