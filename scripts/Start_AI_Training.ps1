<#
.SYNOPSIS
From nothing to a trained, measured tagger: environment, demo data, training, evaluation, three tagged images.
.DESCRIPTION
-ConfigPath       a recipe; without it configs\demo.yaml is trained
-TrainingArgs     words for the trainer: 'section.key=value', '--resume', 'latest'; they may also stand at the end
-KeepOpenOnError  wait for Enter when it fails, so that a window opened by a double click stays readable
.EXAMPLE
powershell -ExecutionPolicy Bypass -File scripts\Start_AI_Training.ps1 training.num_epochs=3 run.name=short
.EXAMPLE
.\scripts\Start_AI_Training.ps1 -ConfigPath configs\demo.yaml -TrainingArgs '--resume', 'latest'
#>
[CmdletBinding(PositionalBinding = $false)]
param(
    [string]$ConfigPath = '',
    [Parameter(ValueFromRemainingArguments = $true)]
    [string[]]$TrainingArgs = @(),
    [switch]$KeepOpenOnError
)
$ErrorActionPreference = 'Stop'
$root = Split-Path -Parent $PSScriptRoot
$before = $env:TAGSMITH_CALLED_FROM
$policyBefore = $env:OMP_WAIT_POLICY
$env:TAGSMITH_CALLED_FROM = (Get-Location -PSProvider FileSystem).ProviderPath
# Threads that wait give their core back; spinning, they slow training several times beside any other busy process.
if (-not $env:OMP_WAIT_POLICY) { $env:OMP_WAIT_POLICY = 'PASSIVE' }
$code = 1
Push-Location -LiteralPath $root
try {
    & (Join-Path $PSScriptRoot 'setup_env.ps1')
    $code = $LASTEXITCODE
    if ($code -eq 0) {
        $words = @('-m', 'scripts.start_training')
        if ($ConfigPath) { $words += @('--config', $ConfigPath) }
        if ($TrainingArgs) { $words += $TrainingArgs }
        & (Join-Path $root '.venv\Scripts\python.exe') @words
        $code = $LASTEXITCODE
    }
}
catch {
    [Console]::Error.WriteLine("error: $($_.Exception.Message)")
    $code = 1
}
finally {
    $env:TAGSMITH_CALLED_FROM = $before
    $env:OMP_WAIT_POLICY = $policyBefore
    Pop-Location
}
if (($code -ne 0) -and $KeepOpenOnError) {
    Read-Host "Training ended with exit code $code. Press Enter to close" | Out-Null
}
exit $code
