"""What a party can prove later: its audit log and the dossiers of its jobs."""
