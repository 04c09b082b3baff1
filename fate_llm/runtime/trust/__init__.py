"""What a party lets happen: signed job specifications, its policy, its data catalogue."""
